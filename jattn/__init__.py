"""jattn: attention for JAX as pure functions.

params = jattn.init(key, embed_dim=10, qk_dim=20, v_dim=25)
y = jattn.attend(params, x)                                    [T, D] -> [T, V]
out = jattn.attention(q, k, v, mask=jattn.masks.Causal())      [..., T, N, H] -> [..., T, N, V]
"""

from jattn import masks as masks
from jattn import scores as scores
from jattn.compat import dot_product_attention as dot_product_attention
from jattn.compat import flax_attention_fn as flax_attention_fn
from jattn.dispatch import attention as attention
from jattn.dispatch import attention_weights as attention_weights
from jattn.dispatch import attention_with_lse as attention_with_lse
from jattn.explanation import Explanation as Explanation
from jattn.explanation import explain as explain
from jattn.implementations import Blockwise as Blockwise
from jattn.layer import attend as attend
from jattn.layer import context_vector as context_vector
from jattn.params import Params as Params
from jattn.params import from_matrices as from_matrices
from jattn.params import init as init
from jattn.projection import project as project
from jattn.retrieval import enrich as enrich
from jattn.retrieval import lookup as lookup
from jattn.retrieval import multi_hot as multi_hot
from jattn.rotary import Rotary as Rotary
from jattn.scores import Dropout as Dropout
from jattn.softmax import merge as merge
from jattn.version import __version__ as __version__
