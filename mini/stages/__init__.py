"""The stages that train the mini world, one file a stage."""
