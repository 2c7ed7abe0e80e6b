"""The networks, in Flax Linen. They know neither data nor training, and import JAX and Flax only.

lara_vla.py        the whole model: prefix, latent loop, suffix, actions
latent_loop.py     K slots in a scan, weights in place; tape.py makes its weight gradients
vision_tower.py    Qwen3-VL's images to tokens
text_decoder.py    its decoder, scanned over layers
visual_latent.py   predicting the next frame
action_expert.py   flow matching on the hidden states
attention.py, masks.py, rope.py, layers.py: what they share
"""
