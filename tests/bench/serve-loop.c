/*
 * The same small loop for two builds of llama.cpp: reads a prompt, then answers greedily, and says how fast.
 *
 *     loop MODEL THREADS PROMPT_TOKENS ANSWER_TOKENS [BACKENDS]
 *
 * One line of JSON: microseconds of reading and of answering, and the answer's tokens. With BACKENDS the processor's
 * back end is loaded from that folder, the best variant first, as the engine does it.
 */
#include "llama.h"
#include "ggml-backend.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static llama_token greedy(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

int main(int argc, char **argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: loop MODEL THREADS PROMPT_TOKENS ANSWER_TOKENS [BACKENDS]\n");
        return 2;
    }
    const int threads = atoi(argv[2]), n_prompt = atoi(argv[3]), n_answer = atoi(argv[4]);
    llama_log_set(quiet, NULL);
    if (argc > 5) ggml_backend_load_all_from_path(argv[5]);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fprintf(stderr, "no model\n"), 1;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = n_prompt + n_answer + 64;
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) return fprintf(stderr, "no context\n"), 1;
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token *prompt = malloc(sizeof(llama_token) * n_prompt);
    unsigned long state = 42;
    for (int i = 0; i < n_prompt; i++) {
        state = state * 6364136223846793005UL + 1442695040888963407UL;
        prompt[i] = 300 + (state >> 33) % 1000;
    }
    /* Twice: the first reading touches the weights' pages. */
    double reading = 0, answering = 0;
    llama_token *answer = malloc(sizeof(llama_token) * (n_answer + 1));
    for (int round = 0; round < 2; round++) {
        llama_memory_clear(llama_get_memory(context), true);
        double begun = now_us();
        for (int at = 0; at < n_prompt; at += 512) {
            int n = n_prompt - at < 512 ? n_prompt - at : 512;
            if (llama_decode(context, llama_batch_get_one(prompt + at, n))) return fprintf(stderr, "decode\n"), 1;
        }
        answer[0] = greedy(llama_get_logits_ith(context, -1), n_vocab);
        reading = now_us() - begun;
        begun = now_us();
        for (int i = 0; i < n_answer; i++) {
            if (llama_decode(context, llama_batch_get_one(answer + i, 1))) return fprintf(stderr, "decode\n"), 1;
            answer[i + 1] = greedy(llama_get_logits_ith(context, -1), n_vocab);
        }
        answering = now_us() - begun;
    }
    printf("{\"reading_us\":%.0f,\"answering_us\":%.0f,\"tokens\":[", reading, answering);
    for (int i = 0; i <= n_answer; i++) printf("%s%d", i ? "," : "", answer[i]);
    printf("]}\n");
    return 0;
}
