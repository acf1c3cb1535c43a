"Everything that answers: the model, its baselines and its peers. `from biojepa.predict import predict` is enough for most."
from . import disk
from .anndata import predict
from .model import predictions
from .sets import PredictionSet, test_set
