"""Generated from proto/spinetta/v1 by scripts/genproto.py."""
