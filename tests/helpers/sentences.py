"""What a user reads of an error."""


def one_sentence(error) -> str:
    """The text of a caught error, checked for being one sentence; a file's name may begin it."""
    text = str(error.value)
    assert text[0].isupper() or text.split()[0].strip(":").endswith((".safetensors", ".bin"))
    assert text.endswith(".") and "\n" not in text and text.count(". ") == 0
    return text
