"""What the commands and :class:`genar.train_plan.TrainPlan` take where nothing is said: here alone, so that
``genar --help`` need not load what uses them."""

MODEL, PRESET, RECIPE = "genar", "small", "default"
PANEL, N_GENES = "clean", 200
ENCODER = "efficientnet_lite0"
"""embedded: works offline"""
PATCH, INPUT, PRECISION = "hest", "features", "fp32"
"""patch convention, what a model sees, and the encoder's arithmetic"""
WIDTHS_UM = (112.0, 309.0)
"""of the patches of model ``genar``"""
VIEWS = 0
"""as many as the encoder's row says"""
PAPER_N_TOP = 241
"""rank cut of panel recipe ``paper``: gives the 208 genes of the paper's HER2ST list"""
BATCH_SIZE = 16
"""patches that go through the encoder at once"""
RESAMPLES = 1000
"""of the spots, for the intervals of scores"""
