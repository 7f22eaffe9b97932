// State other than memory, read inside the freeze: threads' registers and queues, what the state modules asked for, and the
// descriptor table. Raw bytes only; Python makes sense of them after the thaw.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "source_internal.h"

enum { SIGINFO_SIZE = 128, CLEAR_CHILD_TID = 40 /* PR_GET_TID_ADDRESS */ };

int file_read_whole(struct arena *arena, const char *path, const uint8_t **data, uint64_t *size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno;
    size_t room = 8192, used = 0;
    uint8_t *buffer = malloc(room);
    int err = buffer ? 0 : ENOMEM;
    while (!err) {
        if (used == room) {
            uint8_t *more = realloc(buffer, room * 2);
            if (!more) {
                err = ENOMEM;
                break;
            }
            buffer = more;
            room *= 2;
        }
        ssize_t got = read(fd, buffer + used, room - used);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) err = errno;
        if (got <= 0) break;
        used += (size_t)got;
    }
    close(fd);
    if (!err) {
        uint8_t *kept = arena_take(arena, used + 1);
        if (kept) {
            memcpy(kept, buffer, used);
            *data = kept;
            *size = used;
        } else {
            err = ENOMEM;
        }
    }
    free(buffer);
    return err;
}

static int pending_read(struct tm_source *source, pid_t tid, bool shared, const uint8_t **out, uint32_t *count) {
    struct __ptrace_peeksiginfo_args args = {0, shared ? PTRACE_PEEKSIGINFO_SHARED : 0, 16};
    uint8_t found[16][SIGINFO_SIZE], *all = NULL;
    uint32_t n = 0;
    for (;;) {
        args.off = n;
        long got = ptrace(PTRACE_PEEKSIGINFO, tid, &args, found);
        if (got == 0) break;
        uint8_t *more = got < 0 ? NULL : realloc(all, (n + (size_t)got) * SIGINFO_SIZE);
        if (!more) {
            int err = errno;
            free(all);
            return err;
        }
        all = more;
        memcpy(all + (size_t)n * SIGINFO_SIZE, found, (size_t)got * SIGINFO_SIZE);
        n += (uint32_t)got;
    }
    uint8_t *kept = arena_take(&source->arena, (size_t)n * SIGINFO_SIZE + 1);
    if (kept && n) memcpy(kept, all, (size_t)n * SIGINFO_SIZE);
    free(all);
    *out = kept;
    *count = n;
    return kept ? 0 : ENOMEM;
}

static int thread_read(struct tm_source *source, struct thread *thread, struct tm_thread_state *out,
                       struct tm_error *error) {
    *out = (struct tm_thread_state){.tid = thread->tid};
    memcpy(out->regs, &thread->regs, sizeof out->regs);
    uint8_t image[TM_XSTATE_MOST];
    struct iovec area = {image, sizeof image};
    if (ptrace(PTRACE_GETREGSET, thread->tid, (void *)0x202 /* NT_X86_XSTATE */, &area))
        return tm_error_errno(error, "PTRACE_GETREGSET", "cannot read the extended state of thread %d", thread->tid);
    uint8_t *kept = arena_take(&source->arena, area.iov_len);
    if (!kept) return tm_error_set(error, TM_NOMEM, 0, "malloc", "no memory");
    memcpy(kept, image, area.iov_len);
    out->xstate = kept;
    out->xstate_size = (uint32_t)area.iov_len;
    if (ptrace(PTRACE_GETSIGMASK, thread->tid, (void *)8, &out->sigmask))
        return tm_error_errno(error, "PTRACE_GETSIGMASK", "cannot read the signal mask of thread %d", thread->tid);
    struct __ptrace_rseq_configuration rseq = {0};
    if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, thread->tid, (void *)sizeof rseq, &rseq) > 0) {
        out->rseq_pointer = rseq.rseq_abi_pointer;
        out->rseq_size = rseq.rseq_abi_size;
        out->rseq_signature = rseq.signature;
        out->rseq_flags = rseq.flags;
    }
    if (syscall(SYS_get_robust_list, thread->tid, &out->robust_head, &out->robust_len))
        return tm_error_errno(error, "get_robust_list", "cannot read the robust list of thread %d", thread->tid);
    int err = pending_read(source, thread->tid, false, &out->pending, &out->n_pending);
    if (err) return tm_error_set(error, tm_error_code(err), err, "PTRACE_PEEKSIGINFO", "cannot read queued signals");
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d/comm", source->pid, thread->tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t got = read(fd, out->comm, sizeof out->comm - 1);
        if (got > 0 && out->comm[got - 1] == '\n') out->comm[got - 1] = 0;
        close(fd);
    }
    return TM_OK;
}

static int probe_call(struct injection *in, const struct tm_probe *probe, struct tm_answer *answer,
                      struct tm_error *error) {
    struct tm_source *source = in->source;
    uint32_t in_size = probe->data_size, out_size = probe->out_size;
    if (in_size > TM_CALL_BUFFER || out_size > TM_CALL_BUFFER)
        return tm_error_set(error, TM_SYS, EINVAL, "probe", "a probe wants more than the call buffer holds");
    if (in_size) {
        struct iovec local = {(void *)(uintptr_t)probe->data, in_size},
                     remote = {(void *)(uintptr_t)in->buffer, in_size};
        if (process_vm_writev(source->pid, &local, 1, &remote, 1, 0) != (ssize_t)in_size)
            return tm_error_errno(error, "process_vm_writev", "cannot write below the stack");
    }
    uint64_t args[6];
    for (int i = 0; i < 6; i++) args[i] = probe->args[i] == UINT64_MAX ? in->buffer : probe->args[i];
    int code = inject_call(in, probe->nr, args, &answer->ret, error);
    if (code || !out_size || answer->ret < 0) return code;
    uint8_t *data = arena_take(&source->arena, out_size);
    if (!data) return tm_error_set(error, TM_NOMEM, 0, "malloc", "no memory");
    int err = target_read(source, in->buffer, data, out_size);
    if (err) return tm_error_set(error, TM_GONE, err, "process_vm_readv", "cannot read a call's result");
    answer->data = data;
    answer->size = out_size;
    return TM_OK;
}

// The answer is a row of frames, each a u32 size and as many bytes: what one read gives, a packet in packet mode.
static void probe_tee(struct tm_source *source, const struct tm_probe *probe, struct tm_answer *answer) {
    int pair[2], room = fcntl(probe->fd, F_GETPIPE_SZ);
    uint64_t most = probe->out_size + sizeof(uint32_t) * ((uint64_t)(room > 0 ? room : 0) / TM_PAGE_SIZE + 1);
    uint8_t *data = arena_take(&source->arena, most);
    answer->ret = -ENOMEM;
    if (!data) return;
    if (pipe2(pair, O_CLOEXEC | O_NONBLOCK)) {
        answer->ret = -errno;
        return;
    }
    if (room > 0) fcntl(pair[1], F_SETPIPE_SZ, room);
    ssize_t got = tee(probe->fd, pair[1], probe->out_size, SPLICE_F_NONBLOCK);
    answer->ret = got < 0 ? (errno == EAGAIN ? 0 : -errno) : got;
    uint64_t used = 0;
    while (got > 0 && used + sizeof(uint32_t) < most) {
        ssize_t n = read(pair[0], data + used + sizeof(uint32_t), most - used - sizeof(uint32_t));
        if (n <= 0) break;
        uint32_t size = (uint32_t)n;
        memcpy(data + used, &size, sizeof size);
        used += sizeof size + (uint64_t)n;
        got -= n;
    }
    answer->data = data;
    answer->size = used;
    close(pair[0]);
    close(pair[1]);
}

static void probe_outside(struct tm_source *source, const struct tm_probe *probe, struct tm_answer *answer) {
    if (probe->kind == TM_PROBE_TEE) {
        probe_tee(source, probe, answer);
    } else if (probe->kind == TM_PROBE_FILE) {
        int err = file_read_whole(&source->arena, probe->path, &answer->data, &answer->size);
        answer->ret = err ? -err : (int64_t)answer->size;
    } else if (probe->kind == TM_PROBE_PEEK) {
        uint8_t *data = arena_take(&source->arena, probe->out_size + 1);
        ssize_t got = data ? recv(probe->fd, data, probe->out_size, MSG_PEEK | MSG_DONTWAIT) : -1;
        answer->ret = got < 0 ? -(data ? errno : ENOMEM) : got;
        answer->data = data;
        answer->size = got > 0 ? (uint64_t)got : 0;
    }
}

static bool is_of_thread(const struct tm_probe *probe, uint32_t index) {
    return probe->kind == TM_PROBE_CALL_EACH || (probe->kind == TM_PROBE_CALL && index == 0);
}

static const struct tm_probe tid_address = {
    .kind = TM_PROBE_CALL_EACH, .nr = SYS_prctl, .args = {CLEAR_CHILD_TID, UINT64_MAX}, .out_size = sizeof(uint64_t)};

static bool asks_tid_address(const struct tm_probe *probe) {
    return probe->kind == TM_PROBE_CALL_EACH && probe->nr == SYS_prctl && probe->args[0] == CLEAR_CHILD_TID;
}

// One by one: what the chain did not answer.
static int thread_calls(struct tm_source *source, const struct tm_freeze_plan *plan, uint32_t index,
                        struct tm_error *error) {
    struct thread *thread = &source->threads.at[index];
    struct injection in = {0};
    int code = TM_OK;
    for (uint32_t i = 0; !code && i < plan->n_probes; i++) {
        struct tm_answer *to = &source->answers[(size_t)i * source->n_threads + index];
        if (!is_of_thread(&plan->probes[i], index) || to->given) continue;
        if (!in.begun) {
            code = inject_begin(&in, source, thread, error);
            if (code == TM_DEADLINE && !source->scratch) {
                code = scratch_make(source, error);
                if (!code) code = inject_begin(&in, source, thread, error);
            }
        }
        if (!code) code = probe_call(&in, &plan->probes[i], to, error);
    }
    int end = inject_end(&in, code ? NULL : error);
    return code ? code : end;
}

// What the kernel will clear at each thread's end: asked for by a probe, or else by us.
static int tid_addresses(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error) {
    uint32_t asked = 0;
    while (asked < plan->n_probes && !asks_tid_address(&plan->probes[asked])) asked++;
    int code = TM_OK;
    for (uint32_t i = 0; !code && i < source->n_threads; i++) {
        struct tm_answer own = {0};
        const struct tm_answer *answer = &own;
        if (asked < plan->n_probes) {
            answer = &source->answers[(size_t)asked * source->n_threads + i];
        } else {
            struct injection in;
            if (inject_begin(&in, source, &source->threads.at[i], NULL) == TM_OK) {
                code = probe_call(&in, &tid_address, &own, error);
                int end = inject_end(&in, code ? NULL : error);
                if (!code) code = end;
            }
        }
        if (answer->size == sizeof(uint64_t))
            memcpy(&source->threads.at[i].clear_child_tid, answer->data, sizeof(uint64_t));
    }
    return code;
}

enum { CHAINS_AT_ONCE = 8 }; // more would only wait for a CPU, and might wait too long

static int chain_begin(struct chain *chain, struct tm_source *source, const struct tm_freeze_plan *plan, uint32_t index,
                       struct tm_error *error) {
    *chain = (struct chain){0};
    if (!chain_fits(source, &source->threads.at[index])) return TM_OK;
    for (uint32_t i = 0; i < plan->n_probes; i++)
        if (is_of_thread(&plan->probes[i], index) && chain_suits(source, &plan->probes[i]))
            chain_add(chain, &plan->probes[i], &source->answers[(size_t)i * source->n_threads + index]);
    int begun = inject_begin_with(&chain->in, source, &source->threads.at[index], chain_room(chain), error);
    if (begun) return begun == TM_DEADLINE ? TM_OK : begun;
    int code = chain_launch(chain, error);
    chain->launched = !code;
    if (code) inject_end(&chain->in, NULL);
    return code;
}

static int chain_over(struct chain *chain, struct tm_error *error) {
    if (!chain->launched) return TM_OK;
    chain->launched = false;
    int code = chain_finish(chain, error);
    inject_end(&chain->in, NULL);
    return code;
}

// Several threads at once: each runs its chain of calls while the next is launched. One without room for it is asked later.
static int chains_run(struct tm_source *source, const struct tm_freeze_plan *plan, struct tm_error *error) {
    struct chain *chains = calloc(CHAINS_AT_ONCE, sizeof *chains);
    if (!chains) return tm_error_set(error, TM_NOMEM, 0, "calloc", "no memory");
    int code = TM_OK;
    for (uint32_t index = 0; index < source->n_threads + CHAINS_AT_ONCE; index++) {
        struct chain *chain = &chains[index % CHAINS_AT_ONCE];
        int ended = chain_over(chain, code ? NULL : error);
        if (!code) code = ended;
        if (!code && index < source->n_threads) code = chain_begin(chain, source, plan, index, error);
    }
    free(chains);
    return code;
}

static void leader_first(struct tm_source *source) {
    for (uint32_t i = 0; i < source->threads.n; i++)
        if (source->threads.at[i].tid == source->pid) {
            struct thread leader = source->threads.at[i];
            source->threads.at[i] = source->threads.at[0];
            source->threads.at[0] = leader;
        }
}

int state_read_threads(struct tm_source *source, struct tm_error *error) {
    leader_first(source);
    if (source->threads.at[0].tid != source->pid)
        return tm_error_set(error, TM_UNSUPPORTED, 0, "ptrace", "its first thread has ended while others run on");
    source->n_threads = source->threads.n;
    source->thread_faces = arena_take(&source->arena, source->n_threads * sizeof *source->thread_faces);
    if (!source->thread_faces) return tm_error_set(error, TM_NOMEM, 0, "malloc", "no memory");
    for (uint32_t i = 0; i < source->n_threads; i++) {
        int code = thread_read(source, &source->threads.at[i], &source->thread_faces[i], error);
        if (code) return code;
    }
    int err = pending_read(source, source->pid, true, &source->shared_pending, &source->n_shared_pending);
    if (!err) return TM_OK;
    return tm_error_set(error, tm_error_code(err), err, "PTRACE_PEEKSIGINFO", "cannot read queued signals");
}

int state_make_calls(struct tm_source *source, struct tm_error *error) {
    const struct tm_freeze_plan *plan = source->plan;
    source->n_probes = plan->n_probes;
    source->answers =
        arena_take(&source->arena, (size_t)plan->n_probes * source->n_threads * sizeof *source->answers + 1);
    if (!source->answers) return tm_error_set(error, TM_NOMEM, 0, "malloc", "no memory");
    int code = source->filtered ? TM_OK : chains_run(source, plan, error);
    for (uint32_t i = 0; !code && i < source->n_threads; i++) code = thread_calls(source, plan, i, error);
    scratch_drop(source);
    if (!code) code = tid_addresses(source, plan, error);
    return code;
}

void state_read_outside(struct tm_source *source) {
    const struct tm_freeze_plan *plan = source->plan;
    for (uint32_t i = 0; i < plan->n_probes; i++)
        if (plan->probes[i].kind >= TM_PROBE_FILE)
            probe_outside(source, &plan->probes[i], &source->answers[(size_t)i * source->n_threads]);
}

static int number_order(const void *left, const void *right) {
    int a = ((const struct tm_descriptor_state *)left)->number, b = ((const struct tm_descriptor_state *)right)->number;
    return (a > b) - (a < b);
}

static int descriptor_read(struct tm_source *source, int number, struct tm_descriptor_state *out) {
    char path[64], link[4096];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", source->pid, number);
    ssize_t size = readlink(path, link, sizeof link - 1);
    if (size < 0) return errno;
    char *kept = arena_take(&source->arena, (size_t)size + 1);
    if (!kept) return ENOMEM;
    memcpy(kept, link, (size_t)size);
    snprintf(path, sizeof path, "/proc/%d/fdinfo/%d", source->pid, number);
    const uint8_t *info;
    uint64_t info_size;
    int err = file_read_whole(&source->arena, path, &info, &info_size);
    if (err) return err;
    *out = (struct tm_descriptor_state){number, number, kept, (const char *)info};
    return 0;
}

// kcmp gives open files an order, 1 less and 2 greater: those that are the same become neighbours without comparing all pairs.
static int file_order(pid_t pid, int left, int right) {
    enum { KCMP_FILE = 0 };
    long order = syscall(SYS_kcmp, pid, pid, KCMP_FILE, left, right);
    return order == 1 ? -1 : order == 0 ? 0 : 1;
}

// Only descriptors with the same link can share an open file.
static int open_file_order(const void *left, const void *right, void *source) {
    const struct tm_descriptor_state *a = left, *b = right;
    int order = strcmp(a->link, b->link);
    if (!order && a->number != b->number) order = file_order(((struct tm_source *)source)->pid, a->number, b->number);
    return order ? order : number_order(left, right);
}

static void descriptors_group(struct tm_source *source) {
    struct tm_descriptor_state *list = source->descriptors;
    qsort_r(list, source->n_descriptors, sizeof *list, open_file_order, source);
    for (uint32_t i = 1; i < source->n_descriptors; i++)
        if (strcmp(list[i].link, list[i - 1].link) == 0 &&
            file_order(source->pid, list[i].number, list[i - 1].number) == 0)
            list[i].same_as = list[i - 1].same_as;
    qsort(list, source->n_descriptors, sizeof *list, number_order);
}

int state_read_descriptors(struct tm_source *source, struct tm_error *error) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd", source->pid);
    DIR *dir = opendir(path);
    if (!dir) return tm_error_errno(error, "opendir", "cannot list the descriptors");
    uint32_t capacity = 0;
    source->n_descriptors = 0;
    struct tm_descriptor_state *list = NULL;
    int err = 0;
    for (struct dirent *entry; !err && (entry = readdir(dir));) {
        if (entry->d_name[0] == '.') continue;
        if (source->n_descriptors == capacity) {
            capacity = capacity ? capacity * 2 : 64;
            struct tm_descriptor_state *more = realloc(list, capacity * sizeof *list);
            if (!more) {
                err = ENOMEM;
                break;
            }
            list = more;
        }
        err = descriptor_read(source, (int)strtol(entry->d_name, NULL, 10), &list[source->n_descriptors++]);
    }
    closedir(dir);
    if (!err) {
        source->descriptors = arena_take(&source->arena, (source->n_descriptors + 1) * sizeof *list);
        if (source->descriptors && list) memcpy(source->descriptors, list, source->n_descriptors * sizeof *list);
        if (!source->descriptors) err = ENOMEM;
    }
    free(list);
    if (err) {
        source->n_descriptors = 0;
        return tm_error_set(error, tm_error_code(err), err, "read", "cannot read the descriptors");
    }
    descriptors_group(source);
    return TM_OK;
}
