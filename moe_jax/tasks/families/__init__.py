"""Task families, one per file; importing this package registers all tasks in `TASKS`.

To add a task, add a file with a frozen dataclass derived from `Task` and decorated with
`@TASKS.register("its_name")`, and import the class below. The class has the data set on the hub
(`hub`) and a method `question` that converts a row to a `Question`; `openbookqa.py` is a short
example. The name is then known to `moe-jax evaluate --tasks`, to `evaluation.tasks`, and to `task`
of a data set.
"""

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
