"""The verbs of the command line, one file each; `otcclip.cli` lists them.

A verb is a function whose annotations and docstring are its options and help (tyro). It imports what it runs inside its
body, so that `otcclip --help` answers at once, and raises UserError for what a user can mend.
"""
