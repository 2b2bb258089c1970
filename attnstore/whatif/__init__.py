"""The calculator behind `attnstore plan`: the cost of storing, moving and recomputing a model's KV on other hardware. See
docs/plan.md.
"""

from attnstore.whatif.estimate import Decode, FirstToken, Plan, Question, answer
from attnstore.whatif.hardware import GPUS, Gpu
from attnstore.whatif.model import Model, load_model, model_names

__all__ = ["GPUS", "Decode", "FirstToken", "Gpu", "Model", "Plan", "Question", "answer", "load_model", "model_names"]
