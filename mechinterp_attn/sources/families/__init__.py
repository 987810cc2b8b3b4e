"""Hugging Face's families of models: what each is made of, read off its own modules.

``table.py`` holds what no module tells, one line a family; the other files hold one rule each.
"""
