"Small Core ML programs for tests, made with the builder of coremltools."
from pathlib import Path

import pytest

from mixbook.constants import coremltools, quiet
from mixbook.package import Package, read_package, _read_function, _weight_files


@pytest.fixture(scope="session")
def ct(): return coremltools()


def kind(name):
    "coremltools' type of elements."
    from coremltools.converters.mil.mil import types
    return types.string_to_builtin(name)


def packed_type(name):
    "coremltools' numpy type for elements of less than eight bits."
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.type_mapping import nptype_from_builtin
    return nptype_from_builtin(getattr(types, name))


def built(ct, build, specs, target=None, states=()):
    "The program that `build` makes of placeholders."
    from coremltools.converters.mil.mil import Builder as mb
    inputs = [mb.TensorSpec(s, kind(d)) for s, d in specs] + [mb.StateTensorSpec(s, kind("fp16")) for s in states]
    return mb.program(input_specs=inputs, opset_version=target or ct.target.iOS18)(build)


def compiled(ct, build, specs, folder, target=None, states=()):
    "A package that was never saved: a program through the protobuf and a weight file, without the model's description, so with inputs of any type."
    from coremltools.converters.mil.backend.mil.load import MILProtoExporter
    folder = Path(folder)
    (folder / "weights").mkdir(exist_ok=True)
    with quiet(): proto = MILProtoExporter(prog=built(ct, build, specs, target, states), weights_dir=str(folder / "weights"), specification_version=(target or ct.target.iOS18).value).export()
    f = _read_function("main", proto.functions["main"], _weight_files(folder))
    return Package(folder, {"main": f}, "main", 9, {}, {}, {})


def saved(ct, build, specs, path, target=None, states=()):
    "A package on disk."
    with quiet(): ct.convert(built(ct, build, specs, target, states), convert_to="mlprogram", minimum_deployment_target=target or ct.target.iOS18, pass_pipeline=ct.PassPipeline.EMPTY).save(str(path))
    return read_package(path)


def traced(ct, module, shapes, path, outputs=("y",), **kw):
    "A torch module, converted with the default passes."
    import numpy as np, torch
    with quiet():
        t = torch.jit.trace(module.eval(), tuple(torch.zeros(s) for s in shapes.values()))
        ct.convert(t, inputs=[ct.TensorType(k, s, dtype=np.float16) for k, s in shapes.items()], outputs=[ct.TensorType(k, dtype=np.float16) for k in outputs], minimum_deployment_target=ct.target.iOS18, **kw).save(str(path))
    return read_package(path)
