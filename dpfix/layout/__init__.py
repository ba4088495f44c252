"""Where the samples are in every tensor."""
