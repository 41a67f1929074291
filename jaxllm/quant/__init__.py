"""From a model to one whose weights are stored in fewer bits, layer by layer.

quantize        a whole model by one method or a recipe
recipe          which linear gets which method
method_options  a method's options as the command line and recipe files give them
checkpoint      finished blocks of a run, kept in files
sensitivity     what each method costs each layer; the best recipe within a budget
dec_dec_tuner   how many residual rows of DecDEC a GPU has time for: a recipe
source          where a layer's statistics come from: a calibration, or text
calibrate       what linears see on sample text, kept on disk
statistics      the statistics there are, and what a method is
sums            statistics summed over a text, block by block
gradients       what needs the loss: one pass backwards, block by block
stages          the linears of a model, stage by stage
text            calibration text in batches
methods/        one file a method
"""
