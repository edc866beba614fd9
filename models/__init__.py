"""Other architectures than the fixed GPT-2, and the kernels that all of them run on.

The fixed model of the optimizer track is in train_gpt.py, in plain modules. Another one is a file
of this folder with a class of the same interface. Models know layers, kernels and the GPU, but no
optimizers, steps, ranks or Config.

    forward(inputs, targets)       returns the cross-entropy in nats, summed over all tokens
    initialise(seed)               fills all weights, the same on every device and world size
    groups()                       returns parameters by role, for the optimizers
    neurons()                      returns modules whose outputs are MLP neurons, for diagnostics
    hidden(tokens)                 returns the input of the output head
    logits(hidden)                 returns the logits of the next token, for sampling
    choose_kernels(compile, fp8)   decides which kernels run; `kernels` says which, for the log
    rows                           is the most rows of a microbatch that are worth trying

Importing a module of this folder touches no GPU.
"""
