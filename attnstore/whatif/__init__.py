"""What if: what a model's KV costs to keep, move and recompute on hardware that is not here. See docs/plan.md."""

from attnstore.whatif.estimate import Decode, FirstToken, Plan, Question, answer
from attnstore.whatif.hardware import GPUS, Gpu
from attnstore.whatif.model import Model, load_model, model_names

__all__ = ["GPUS", "Decode", "FirstToken", "Gpu", "Model", "Plan", "Question", "answer", "load_model", "model_names"]
