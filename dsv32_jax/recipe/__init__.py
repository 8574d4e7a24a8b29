"""The whole recipe, small: dense model, indexer warm-up, sparse training.

`train.run_stages` trains, `measure.run` measures, `report.write` tells. The
program experiments.quickstart and the notebook are made of these three.
"""
