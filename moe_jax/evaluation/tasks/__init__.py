"""Tasks, one family a file; importing this package enters all of them in `TASKS`."""

from moe_jax.evaluation.task import TASKS as TASKS
from moe_jax.evaluation.tasks.arc import ArcChallenge as ArcChallenge
from moe_jax.evaluation.tasks.arc import ArcEasy as ArcEasy
from moe_jax.evaluation.tasks.boolq import BoolQ as BoolQ
from moe_jax.evaluation.tasks.csqa import CommonsenseQA as CommonsenseQA
from moe_jax.evaluation.tasks.hellaswag import HellaSwag as HellaSwag
from moe_jax.evaluation.tasks.mmlu import Mmlu as Mmlu
from moe_jax.evaluation.tasks.openbookqa import OpenBookQA as OpenBookQA
from moe_jax.evaluation.tasks.piqa import Piqa as Piqa
from moe_jax.evaluation.tasks.pubmedqa import PubMedQA as PubMedQA
from moe_jax.evaluation.tasks.siqa import SocialIQA as SocialIQA
from moe_jax.evaluation.tasks.template import TemplateTask as TemplateTask
from moe_jax.evaluation.tasks.winogrande import WinoGrande as WinoGrande
