"""Tasks, one family a file; importing this package enters all of them in `TASKS`."""

from moe_jax.tasks.families.arc import ArcChallenge as ArcChallenge
from moe_jax.tasks.families.arc import ArcEasy as ArcEasy
from moe_jax.tasks.families.boolq import BoolQ as BoolQ
from moe_jax.tasks.families.csqa import CommonsenseQA as CommonsenseQA
from moe_jax.tasks.families.glue import Cola as Cola
from moe_jax.tasks.families.glue import Mnli as Mnli
from moe_jax.tasks.families.glue import MnliMismatched as MnliMismatched
from moe_jax.tasks.families.glue import Mrpc as Mrpc
from moe_jax.tasks.families.glue import Qnli as Qnli
from moe_jax.tasks.families.glue import Qqp as Qqp
from moe_jax.tasks.families.glue import Rte as Rte
from moe_jax.tasks.families.glue import Sst2 as Sst2
from moe_jax.tasks.families.glue import Stsb as Stsb
from moe_jax.tasks.families.hellaswag import HellaSwag as HellaSwag
from moe_jax.tasks.families.mmlu import Mmlu as Mmlu
from moe_jax.tasks.families.openbookqa import OpenBookQA as OpenBookQA
from moe_jax.tasks.families.piqa import Piqa as Piqa
from moe_jax.tasks.families.pubmedqa import PubMedQA as PubMedQA
from moe_jax.tasks.families.siqa import SocialIQA as SocialIQA
from moe_jax.tasks.families.template import TemplateTask as TemplateTask
from moe_jax.tasks.families.winogrande import WinoGrande as WinoGrande
from moe_jax.tasks.task import TASKS as TASKS
