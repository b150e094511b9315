"""Settings of torch.compile under which a run repeats."""


def compile_repeatably() -> None:
    """Set torch.compile up to compile once for rows of all lengths, with the same result each time.

    For the process. A resumed run then has the kernels of the uninterrupted run, whose first row
    had another length.
    """
    # Seconds to import, and of use only here.
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as shapes

    # It chooses by the number of rows whether and how to fuse the norms' weight gradients: the
    # first row's length decides how all sums are split, and a hidden size of 4,096 is compiled
    # again for rows shorter than 1,280 slots and for rows of 8,192 or more.
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    inductor.deterministic = True  # no choice by timing
    # A first row as long as another dimension, 4,096 slots say, would be compiled for that length.
    shapes.use_duck_shape = False
    # As a dynamic number, a norm's eps is cast by a C++ kernel, which needs a compiler.
    dynamo.specialize_float = True
    # Passes with and without gradient, of policy and reference, in training and evaluation mode.
    # Beyond the limit blocks would silently run as they are: slow, and with other rounding.
    dynamo.recompile_limit = 32
    dynamo.fail_on_recompile_limit_hit = True
