import warnings

# monai, of every training, asks for this module of another package; whoever trains cannot mend that
warnings.filterwarnings("ignore", r"The cuda\.cudart module is deprecated", FutureWarning)
