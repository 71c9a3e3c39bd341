// One persistent pool of threads for all ops. A launch is cut into small pieces; every thread begins with a contiguous
// run of them and then takes from the others' ends, so that a core busy elsewhere costs little.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace medusa::cpu {

using Body = void (*)(const void* context, int piece);

// Calls body for every piece in [0, pieces) and returns when all are done; which thread does which is open. `work` is
// about the number of nanoseconds that one thread would need: little work stays on the calling thread.
void run_pieces(int pieces, double work, Body body, const void* context);

// At least `bytes` of this thread's own memory, 64-byte aligned, kept until the next call with the same purpose: an
// op's buffers for all pieces, its left operand as make_rows made it, a piece's own buffers, a tile packed on the fly.
enum class Scratch { op, rows, piece, tile };
void* scratch(Scratch purpose, size_t bytes);

int num_threads();
void set_num_threads(int threads);

namespace {

template <class F>
inline void parallel_for(int pieces, double work, const F& f) {
  run_pieces(pieces, work, [](const void* context, int piece) { (*static_cast<const F*>(context))(piece); }, &f);
}

template <class T>
inline T* scratch_of(Scratch purpose, size_t count) {
  return static_cast<T*>(scratch(purpose, count * sizeof(T)));
}

}  // namespace
}  // namespace medusa::cpu
