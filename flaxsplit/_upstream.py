"""What depends on the words or the inside of another library, in one place, each with what would replace it."""


def is_about_out_axes(error: ValueError) -> bool:
    """Whether `jax.vmap` refuses an output that is mapped. An error class of its own would replace this."""
    return "out_axes" in str(error)
