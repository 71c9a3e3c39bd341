// Moves the accepted path's rows down behind the committed prefix.
#include <string.h>

#include "isa.h"
#include "threads.h"

namespace medusa::cpu::MEDUSA_ISA {

void compact_kv(const CompactKvParams& p) {
  parallel_for(p.layers * 2 * p.batch, 0.05 * p.layers * 2 * p.batch * p.width * p.row_bytes, [&](int index) {
    const int b = index % p.batch, kv = index / p.batch % 2, layer = index / p.batch / 2;
    const int64_t start =
        layer * p.layer_stride + kv * p.kv_stride + b * p.batch_stride + p.cache_seqlens[b] * p.row_stride;
    char* rows = static_cast<char*>(p.kv_cache) + start * p.element_size;
    const int64_t row_bytes = p.row_stride * p.element_size;
    // Nodes rise along a path, so a row never lands on one that is still to be moved.
    for (int i = 0; i <= p.accept_length[b]; ++i) {
      const int node = p.accepted_nodes[static_cast<int64_t>(b) * p.width + i];
      if (node != i) memcpy(rows + i * row_bytes, rows + node * row_bytes, p.row_bytes);
    }
  });
}

}  // namespace medusa::cpu::MEDUSA_ISA
