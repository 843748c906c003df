"""Mixed MXFP4 / MXFP6 / MXFP8 for the linear layers of a model: `torch.compile(model, backend="micromix")`."""

from micromix_compile import integrations
from micromix_compile.calibration import Calibration, calibrate
from micromix_compile.checkpoint import save_pretrained
from micromix_compile.errors import MicroMixError
from micromix_compile.explain import explain
from micromix_compile.plan import LayerPlan, ModelPlan, load_plan
from micromix_compile.recipe import Recipe
from micromix_compile.statistics import load_statistics

__all__ = [
    "Calibration",
    "LayerPlan",
    "MicroMixError",
    "ModelPlan",
    "Recipe",
    "calibrate",
    "explain",
    "load_plan",
    "load_statistics",
    "save_pretrained",
]
__version__ = "0.1.0"

integrations.register()
