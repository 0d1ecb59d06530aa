"""How low-rank a fine-tune is: spectra, ranks and adapters of two checkpoints, or of a LoRA.

    dW = W1 - W0                      W0 before, W1 after, both fp32, shape (out, in)
    U, S, Vh = svd(dW)                S descending: S[0] >= S[1] >= ...
    energy(S)[r - 1]                  share of sum(S**2) that the best rank-r approximation keeps

Each module depends only on those before it: checks, runtime, store; gram, spectra; checkpoints,
alignment, compare, ranks; factors, peft_format, adapters; lora, shrink; summary, columns, drawing,
page; options, cli.  deltarank.study (the report) may import these, never the reverse; only cli
stands above both.
"""

__version__ = "1.0.0"
