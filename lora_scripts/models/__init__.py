"""Model families: recognise, load, encode, predict; and the LoRA attached to them."""
