// What memory does a model with its context take, buffer by buffer, and how much of it is for logits?
//
// llama.cpp says the first in C++ only (a std::map in its staging header), so this is C++ as well: nothing else is. The
// second is a parameter that llama-cpp-2 does not pass on, as is the part of a model that each device gets. The caller is src/ggml.rs. Exceptions end here; an assertion
// of llama.cpp ends the process, whose caller knows that.

#include "llama-ext.h"
#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

extern "C" {

struct agentd_memory {
    llama_model * model;
    llama_context * context;
    uint32_t tokens_of_batch;
    uint32_t rows_of_batch;
};

// As `Buffer` in src/ggml.rs. `device` is 0 for host memory, else one more than its index in ggml's list.
struct agentd_buffer {
    uint64_t device;
    uint64_t model_bytes;
    uint64_t context_bytes;
    uint64_t compute_bytes;
};

static void say(char * error, size_t room, const char * why) { std::snprintf(error, room, "%s", why); }

// Loads the file as the parameters say and makes a context. Null, with the reason, if llama.cpp refuses.
agentd_memory * agentd_memory_open(const char * path, const llama_model_params * model_params,
                                   const llama_context_params * context_params, char * error, size_t room) {
    try {
        llama_model * model = llama_model_load_from_file(path, *model_params);
        if (model == nullptr) {
            say(error, room, "llama.cpp refused the file");
            return nullptr;
        }
        llama_context * context = llama_init_from_model(model, *context_params);
        if (context == nullptr) {
            llama_model_free(model);
            say(error, room, "llama.cpp made no context for it");
            return nullptr;
        }
        const uint32_t rows = context_params->n_outputs_max;
        return new agentd_memory{model, context, context_params->n_batch, rows == 0 ? context_params->n_batch : rows};
    } catch (const std::exception & thrown) {
        say(error, room, thrown.what());
    } catch (...) {
        say(error, room, "something was thrown that is no exception");
    }
    return nullptr;
}

void agentd_memory_close(agentd_memory * memory) {
    if (memory != nullptr) {
        llama_free(memory->context);
        llama_model_free(memory->model);
        delete memory;
    }
}

// Writes at most `room` entries, host memory first; returns how many there are, or -1.
int64_t agentd_memory_buffers(const agentd_memory * memory, agentd_buffer * into, size_t room) {
    try {
        std::vector<agentd_buffer> found(1 + ggml_backend_dev_count());
        for (size_t i = 0; i < found.size(); i++) {
            found[i].device = i;
        }
        for (const auto & [kind, bytes] : llama_get_memory_breakdown(memory->context)) {
            size_t at = 0;
            ggml_backend_dev_t device = ggml_backend_buft_get_device(kind);
            if (!ggml_backend_buft_is_host(kind) && device != nullptr &&
                ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
                for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
                    at = ggml_backend_dev_get(i) == device ? i + 1 : at;
                }
            }
            found[at].model_bytes += bytes.model;
            found[at].context_bytes += bytes.context;
            found[at].compute_bytes += bytes.compute;
        }
        std::copy_n(found.begin(), std::min(room, found.size()), into);
        return static_cast<int64_t>(found.size());
    } catch (...) {
        return -1;
    }
}

uint32_t agentd_memory_vocabulary(const agentd_memory * memory) {
    return static_cast<uint32_t>(llama_vocab_n_tokens(llama_model_get_vocab(memory->model)));
}

// Fills the context to its end, so that every buffer is used as far as it can be. The last batch asks for the logits of
// as many of its tokens as there is room for. Returns how many rows of logits that were, or llama.cpp's negative error.
int64_t agentd_memory_fill(agentd_memory * memory, uint32_t tokens) {
    try {
        const uint32_t vocabulary = agentd_memory_vocabulary(memory);
        const uint32_t most = std::min(memory->tokens_of_batch, tokens);
        llama_batch batch = llama_batch_init(static_cast<int32_t>(most), 0, 1);
        int64_t rows = 0;
        int32_t failed = 0;
        for (uint32_t done = 0; done < tokens && failed == 0;) {
            const uint32_t now = std::min(most, tokens - done);
            const uint32_t wanted = done + now == tokens ? std::min(now, memory->rows_of_batch) : 1;
            batch.n_tokens = static_cast<int32_t>(now);
            for (uint32_t i = 0; i < now; i++) {
                batch.token[i] = static_cast<llama_token>((done + i) * 7919u % vocabulary);
                batch.pos[i] = static_cast<llama_pos>(done + i);
                batch.n_seq_id[i] = 1;
                batch.seq_id[i][0] = 0;
                batch.logits[i] = i + wanted >= now;
            }
            failed = llama_decode(memory->context, batch);
            rows = wanted;
            done += now;
        }
        llama_synchronize(memory->context);
        llama_batch_free(batch);
        return failed == 0 ? rows : (failed > 0 ? -failed : failed);
    } catch (...) {
        return -1000;
    }
}

static thread_local std::vector<float> split_of_next;

// The next model that this thread loads through llama_load_model_from_file lies on its devices in these parts.
void agentd_split_of_next(const float * shares, size_t count) {
    // llama.cpp reads as many as it could have devices.
    split_of_next.assign(count == 0 ? 0 : llama_max_devices(), 0.0f);
    std::copy_n(shares, std::min(count, split_of_next.size()), split_of_next.begin());
}

// The linker calls llama.cpp's function this and ours the other name (build.rs, --wrap).
llama_model * __real_llama_load_model_from_file(const char * path, llama_model_params params);

llama_model * __wrap_llama_load_model_from_file(const char * path, llama_model_params params) {
    std::vector<float> shares;
    shares.swap(split_of_next);
    if (!shares.empty()) {
        params.tensor_split = shares.data();
    }
    return __real_llama_load_model_from_file(path, params);
}

static thread_local uint32_t outputs_of_next = 0;

// The next context that this thread makes through llama_new_context_with_model has room for so many rows of logits.
void agentd_outputs_of_next(uint32_t rows) { outputs_of_next = rows; }

// As above.
llama_context * __real_llama_new_context_with_model(llama_model * model, llama_context_params params);

llama_context * __wrap_llama_new_context_with_model(llama_model * model, llama_context_params params) {
    params.n_outputs_max = outputs_of_next;
    outputs_of_next = 0;
    return __real_llama_new_context_with_model(model, params);
}

}
