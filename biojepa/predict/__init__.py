"Everything that answers: the model, its baselines and its peers; most need only `predict`."
from . import disk
from .anndata import predict
from .model import predictions
from .sets import PredictionSet, test_set
