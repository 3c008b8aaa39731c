"""The method of arXiv 2510.09152 in plain torch: candidate sets, losses, MoClip, the loop.

Read ``subsets``, ``restricted_loss``, ``angle_cap``, ``moclip`` and ``training_loop``: they are the
paper. What is there for speed is in ``fast``, other people's methods are in ``baselines``.

**Notation.** The capitals at the end of a name are the shape of the array: ``hidden_ND`` is
[N, D]. They mean the same in the whole project:

====  ==============================================================================
N     positions at which a loss is taken or a token is scored: rows of hidden states
V     vocabulary
D     hidden size
K     candidates of a position, where all positions have as many places
E     entries: the candidates of all positions in a row, N sets one after the other
R     tokens of the sampled tail
B     sequences of a batch
T     token slots of a sequence, padding included
P     recorded positions of one sample
M     micro-batches of a global batch
G     tensors of an optimizer, each with its gradient
L     layers of a model
U     experts of a mixture, in one layer
Q     tokens whose log-probability is wanted
O     tokens at the end of a context that an answer may begin with
I     items of a task
A     arrays of scores over the same items, for example before and after
Z     bootstrap resamples
J     trials of a search
F     trials on the front of gain against forgetting
S     seeds
X     any other number, said beside the name
====  ==============================================================================

A small letter is a part of what the capital counts (``logits_nV``: of n of the N positions), and
a digit is a length that is always the same (``dots_G3``).
"""
