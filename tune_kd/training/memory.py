"""The old place of these functions of `device`, until all imports have changed."""

from tune_kd.training.device import keep_freed_blocks as keep_freed_blocks
from tune_kd.training.device import peak_memory as peak_memory
from tune_kd.training.device import start_measuring as start_measuring
