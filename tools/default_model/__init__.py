"""How the model that ships with Shoal is made: corpus, tokenizer, training, export, evaluation.

`tools/train_default_model.py` is the command. Nothing here is part of the wheel.
"""
