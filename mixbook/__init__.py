"Find the data mixture, the size and the bits of a model before you train it."
__version__ = "0.1.0"


def _where():
    "Public name to module, from the index that the notebooks export; the commands of the shell stay in `mixbook.cli`."
    from mixbook._modidx import d
    public = (s.split(".")[1:] for module, syms in d["syms"].items() if module != "mixbook.cli" for s in syms)
    modules = {module.removeprefix("mixbook.") for module in d["syms"]}
    return {n[1]: n[0] for n in public if len(n) == 2 and not n[1].startswith("_") and n[1] not in modules}


def __getattr__(name):
    if name.startswith("_"): raise AttributeError(name)
    import importlib
    where = _where()
    if name in where: return getattr(importlib.import_module(f"mixbook.{where[name]}"), name)
    try: return importlib.import_module(f"mixbook.{name}")
    except ModuleNotFoundError as e:
        if e.name != f"mixbook.{name}": raise
    from mixbook.core import did_you_mean
    raise AttributeError(f"mixbook has no {name!r}{did_you_mean(name, where)}")


def __dir__(): return sorted(_where()) + ["__version__"]
