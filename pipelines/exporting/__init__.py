"""Hand-over: a trained generator in the forms that other programs read.

source      which weights: of a checkpoint, or of a model folder
export      weights -> folder with the files of a format -> read back and compared
model_card  README.md of that folder
"""
