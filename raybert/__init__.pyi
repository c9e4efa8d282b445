from raybert.api import Classifier as Classifier
from raybert.api import Run as Run
from raybert.api import finetune as finetune
from raybert.api import pretrain as pretrain
from raybert.api import tune as tune

__version__: str
