"The package's metadata come from settings.ini; the version from mixbook/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_name"]
words = lambda key: cfg[key].split()
lines = lambda key: cfg[key].strip().splitlines()
extras = {k.removesuffix("_requirements"): words(k) for k in cfg if k.endswith("_requirements")}
extras["dev"] = [o for v in extras.values() for o in v]

setup(
    version=re.search(r'^__version__\s*=\s*"([^"]+)"', (here / lib / "__init__.py").read_text(encoding="utf-8"), re.M)[1],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression=cfg["license"],
    keywords=words("keywords"),
    python_requires=">=" + cfg["min_python"],
    classifiers=lines("classifiers"),
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[lib, lib + ".*"]),
    package_data={lib: ["py.typed", "*.html"]},
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={"nbdev": [f"{lib}={lib}._modidx:d"], "console_scripts": lines("console_scripts")},
)
