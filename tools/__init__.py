"""Set-up, host, demo and tests of the repository. Not part of the published pack.

`setup` and `host` use the standard library alone, because they run before anything is installed.
"""
