"""Mixed MXFP4 / MXFP6 / MXFP8 for the linear layers of a model: `torch.compile(model, backend="micromix")`."""

from micromix_compile import integrations
from micromix_compile.calibration import Calibration, calibrate
from micromix_compile.checkpoint import restore, save_pretrained
from micromix_compile.decoder import export_decoder
from micromix_compile.errors import MicroMixError
from micromix_compile.explain import explain
from micromix_compile.export import export
from micromix_compile.package import load_package
from micromix_compile.plan import LayerPlan, ModelPlan, load_plan
from micromix_compile.recipe import Recipe
from micromix_compile.statistics import load_statistics
from micromix_compile.targets import modelled_time

__all__ = [
    "Calibration",
    "LayerPlan",
    "MicroMixError",
    "ModelPlan",
    "Recipe",
    "calibrate",
    "explain",
    "export",
    "export_decoder",
    "load_package",
    "load_plan",
    "load_statistics",
    "modelled_time",
    "restore",
    "save_pretrained",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name != "MicroMixConfig":  # its import brings transformers' quantisers, which takes seconds
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from micromix_compile.integrations.transformers import MicroMixConfig

    return MicroMixConfig


integrations.register()
