"""H-Nets inside Hugging Face transformers (extra `hf`): importing this makes `AutoConfig`, `AutoModelForCausalLM` and
`AutoTokenizer` know model type "hnet".

The classes have the names of `hnet`'s own, as transformers users expect; `model.native` is the same weights as hnet's.
"""

from hnet.errors import UserError

try:
    import transformers
except ImportError:
    raise UserError("hnet.hf needs transformers: pip install 'hnet-kernels[hf]' (Python 3.11 or newer)") from None

from .cache import HNetCache
from .config import HNetConfig
from .model import HNetForCausalLM, HNetOutput
from .tokenizer import HNetTokenizer

transformers.AutoConfig.register("hnet", HNetConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(HNetConfig, HNetForCausalLM, exist_ok=True)
transformers.AutoTokenizer.register(HNetConfig, HNetTokenizer, exist_ok=True)

__all__ = ["HNetCache", "HNetConfig", "HNetForCausalLM", "HNetOutput", "HNetTokenizer"]
