"""What each ATen operator says about the dimensions of its operands.

A rule takes the flow, the node and the node's arguments (tensors as `Value`) and returns the result's `Value`.
It is called only where some operand can still be cut. To support an operator, write its rule and add one line to
`RULES`; an operator without a rule freezes what it touches. An in-place operator has the rule of the one that is not.
"""

from secateur.space.rules import contract, index, layers, shape
from secateur.space.rules.base import ELEMENTWISE, SAME, Rule

_SPATIAL = {
    1: "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices upsample_nearest1d "
    "upsample_linear1d reflection_pad1d replication_pad1d lp_pool1d",
    2: "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest_exact2d "
    "_upsample_nearest_exact2d reflection_pad2d replication_pad2d grid_sampler",
    3: "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices upsample_nearest3d "
    "upsample_trilinear3d reflection_pad3d replication_pad3d",
}

RULES: dict[str, Rule] = {
    f"aten.{name}": rule
    for names, rule in (
        (ELEMENTWISE, shape.elementwise),
        (SAME, shape.same),
        ("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias", shape.view),
        ("permute", shape.permute),
        ("transpose t numpy_T swapaxes swapdims mT adjoint", shape.transpose),
        ("movedim moveaxis", shape.movedim),
        ("unsqueeze", shape.unsqueeze),
        ("squeeze", shape.squeeze),
        ("expand expand_as broadcast_to", shape.expand),
        ("repeat tile", shape.repeat),
        ("repeat_interleave", shape.repeat_interleave),
        ("cat concat concatenate", shape.cat),
        ("stack", shape.stack),
        ("slice narrow", shape.slice_),
        ("split split_with_sizes chunk tensor_split", shape.split_),
        ("unbind", shape.unbind),
        ("select", shape.select),
        ("roll flip", shape.roll),
        ("tril triu", shape.triangle),
        ("copy_ copy", shape.copy_),
        ("fill_diagonal", shape.fill_diagonal),
        ("linear", contract.linear),
        ("addmm", contract.addmm),
        ("matmul mm bmm mv dot", contract.matmul),
        ("baddbmm", contract.baddbmm),
        ("outer ger", contract.outer),
        ("bilinear", contract.bilinear),
        ("einsum", contract.einsum),
        ("scaled_dot_product_attention", contract.attention),
        ("softmax _softmax log_softmax _log_softmax", contract.softmax),
        ("_grouped_mm", contract.experts),
        ("conv1d conv2d conv3d", layers.convolution),
        ("conv_transpose1d conv_transpose2d conv_transpose3d", layers.conv_transpose),
        ("convolution", layers.convolution_general),
        ("layer_norm rms_norm", layers.layer_norm),
        ("batch_norm", layers.batch_norm),
        ("instance_norm", layers.instance_norm),
        ("group_norm", layers.group_norm),
        ("_weight_norm _weight_norm_interface", layers.weight_norm),
        ("prelu", layers.prelu),
        ("glu", layers.glu),
        ("lstm gru rnn_tanh rnn_relu", layers.recurrent),
        ("pixel_shuffle", layers.pixel_shuffle),
        ("pixel_unshuffle", layers.pixel_unshuffle),
        ("channel_shuffle native_channel_shuffle", layers.channel_shuffle),
        ("im2col", layers.im2col),
        ("col2im", layers.col2im),
        ("unfold", layers.unfold),
        ("pad constant_pad_nd", layers.pad),
        *((names, layers.spatial(count)) for count, names in _SPATIAL.items()),
        ("embedding", index.embedding),
        ("embedding_bag", index.embedding_bag),
        ("index", index.index),
        ("index_put _unsafe_index_put", index.index_put),
        ("index_select", index.index_select),
        ("index_add", index.index_add),
        ("gather take_along_dim", index.gather),
        ("scatter scatter_add", index.scatter),
        ("masked_scatter", index.masked_scatter),
        ("topk", index.topk),
        ("sort argsort argmax argmin max min amax amin logsumexp cummax prod any all median", index.coupled),
        ("cumsum cumprod logcumsumexp", index.cumulate),
        ("mean", index.mean),
        ("sum", index.total),
        ("linalg_vector_norm norm", index.norm),
        ("var std var_mean std_mean", index.variance),
    )
    for name in names.split()
}
RULES["transformers.grouped_mm_fallback"] = contract.experts
RULES["secateur.grouped_product"] = contract.experts
