"""The shim: parent of everything a node runs, small, and outliving the daemon.

Run by path (``python -I -S DIRECTORY CONFIG``), it uses the standard library only and imports nothing of the package
around it, so that an upgrade of the package cannot reach into a running shim.
"""
