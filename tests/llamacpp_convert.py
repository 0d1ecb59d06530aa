"""A model and adapters of it as GGUF, by the converters that llama.cpp ships.

python llamacpp_convert.py SOURCES BASE [ADAPTER ...]: SOURCES is llama.cpp's folder; each of the
other folders is converted to FOLDER.gguf.  The base goes without its tokenizer: the converter
knows those of published models alone, and llama.cpp computes logits without one.
"""

import json
import runpy
import sys
from pathlib import Path

sources, base, *adapters = map(Path, sys.argv[1:])
sys.path[:0] = [str(sources), str(sources / "gguf-py")]

import gguf  # noqa: E402
from conversion import (  # noqa: E402
    ModelBase,
    ModelType,
    get_model_architecture,
    get_model_class,
)

config = ModelBase.load_hparams(base, False)
Converter = get_model_class(get_model_architecture(config, ModelType.TEXT))


class WithoutTokenizer(Converter):
    model_arch = Converter.model_arch

    def set_vocab(self):
        self._set_vocab_none()

    def set_gguf_parameters(self):
        super().set_gguf_parameters()
        size = gguf.Keys.LLM.VOCAB_SIZE.format(arch=self.gguf_writer.arch)
        if not any(size in part for part in self.gguf_writer.kv_data):
            self.gguf_writer.add_vocab_size(config["vocab_size"])


# Gemma's cuts the embedding to the entries that it counts here.
entries = {f"<{token}>": token for token in range(config["vocab_size"])}
(base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": entries}, "added_tokens": []}))
WithoutTokenizer(base, gguf.LlamaFileType.ALL_F32, base.with_suffix(".gguf")).write()
for adapter in adapters:
    program = str(sources / "convert_lora_to_gguf.py")
    out = adapter.with_suffix(".gguf")
    sys.argv = [program, "--base", str(base), "--outfile", str(out), str(adapter)]
    runpy.run_path(program, run_name="__main__")
