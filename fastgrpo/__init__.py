"""fastgrpo: exact GRPO steps for vision-language models with a fraction of the work.

Importing starts nothing: no CUDA context, no patching, no environment edits.
"""

from fastgrpo.errors import InputError

__version__ = "0.1.0"
