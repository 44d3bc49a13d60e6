"""Numbers over a set of images that is spread over ranks: of reconstructions, predictions and samples.

`measures` are those of the commands and the validation; `extractors` what sees images, `features` what it sees over
ranks, `fidelity` FID and the like of those, `references` the statistics of a set of images as a file.
"""

from vqdist.evaluation.measures import (
    evaluate_prediction,
    evaluate_proxy,
    evaluate_reconstruction,
    in_eval_mode,
    reconstruct,
)

__all__ = ["evaluate_prediction", "evaluate_proxy", "evaluate_reconstruction", "in_eval_mode", "reconstruct"]
