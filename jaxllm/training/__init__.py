"""Training: any loss on any pytree, gates of a cache, and the models that ship.

trainer      minimises any loss on any pytree; resumes bit for bit
checkpoints  the steps that it resumes from
gates        gates of a cache, trained on KVzip's scores
pico/        the recipe of the models that ship
"""
