from . import peft as peft, safetensors as safetensors
