"""The logits of a GGUF model by llama.cpp, in float32 throughout: run by the Python that has it.

python llamacpp_logits.py TOKENS OUT MODEL [LORA]: TOKENS is a JSON list; OUT gets a NumPy array
(token, entry of the vocabulary).
"""

import json
import sys

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

tokens, out, path, *lora = sys.argv[1:]
model = Llama(
    path,
    lora_path=lora[0] if lora else None,
    n_ctx=256,
    n_threads=1,
    n_threads_batch=1,
    logits_all=True,
    type_k=GGML_TYPE_F32,
    type_v=GGML_TYPE_F32,
    verbose=False,
)
model.eval(json.loads(tokens))
np.save(out, model.scores[: model.n_tokens])
