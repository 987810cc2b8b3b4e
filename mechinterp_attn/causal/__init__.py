"""Behaviours and causes: what does it, proven by intervention."""
