"""A live cluster under a nemesis: what was promised, what happened, and a checker that compares them.

`plan` says what breaks when, `spaces` breaks it, `load` submits and cancels, the `witness` is what each task runs,
`recorder` keeps the store's history, `checker` judges. ``python -m tests.cluster.nemesis --help``
"""
