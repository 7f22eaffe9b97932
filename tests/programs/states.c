// A process with one of everything. It makes its states, is captured, and on `check` verifies each of them itself:
// the source must have kept them, the copy must have them as they were at T0. The answer is one JSON object by name.
#include "states.h"

#include <malloc.h>

const char *states_directory = "/tmp";
struct state *current;

static struct state *const tables[] = {memory_states, descriptor_states, thread_states, process_states};

void wrong(const char *format, ...) {
    if (current->wrong[0]) {
        return;
    }
    va_list list;
    va_start(list, format);
    vsnprintf(current->wrong, sizeof current->wrong, format, list);
    va_end(list);
    for (char *c = current->wrong; *c; c++) {
        if (*c == '"' || *c == '\n' || *c == '\\' || *c == '\t') {
            *c = ' ';
        }
    }
}

ssize_t slurp(const char *path, char *out, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -1;
    }
    size_t done = 0;
    for (;;) {
        ssize_t n = read(fd, out + done, size - 1 - done);
        if (n <= 0) {
            break;
        }
        done += (size_t)n;
    }
    close(fd);
    out[done] = 0;
    return (ssize_t)done;
}

static void answer(const char *command, char *out, size_t size) {
    int n = snprintf(out, size, "{\"pid\": %d", getpid());
    for (size_t t = 0; strcmp(command, "check") == 0 && t < sizeof tables / sizeof *tables; t++) {
        for (current = tables[t]; current->name; current++) {
            if (current->make) {
                current->check();
                n += snprintf(out + n, size - (size_t)n, ", \"%s\": \"%s\"", current->name, current->wrong);
            }
        }
    }
    snprintf(out + n, size - (size_t)n, "}");
}

// A state is left out where `--without` names it (comma list), or `--only` names others.
static int wanted(const struct state *state, const char *only, const char *without) {
    char key[64];
    char text[1024];
    snprintf(key, sizeof key, ",%s,", state->name);
    snprintf(text, sizeof text, ",%s,", without);
    if (strstr(text, key)) {
        return 0;
    }
    snprintf(text, sizeof text, ",%s,", only);
    return strstr(text, key) != NULL || ((!*only || strcmp(only, "all") == 0) && !state->only_named) ||
           (strncmp(only, "all,", 4) == 0 && !state->only_named);
}

int main(int argc, char **argv) {
    mallopt(M_TOP_PAD, 1 << 20); // the break belongs to the state of that name: malloc does not move it
    mallopt(M_MMAP_THRESHOLD, 8192);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    free(malloc(100));
    states_directory = option(argc, argv, "--dir", "/tmp");
    int listener = control_open(option(argc, argv, "--control", "/tmp/states.control"));
    const char *only = option(argc, argv, "--only", "");
    const char *without = option(argc, argv, "--without", "");
    for (size_t t = 0; t < sizeof tables / sizeof *tables; t++) {
        for (current = tables[t]; current->name; current++) {
            if (wanted(current, only, without)) {
                current->make();
            } else {
                current->make = NULL;
            }
            if (current->wrong[0]) {
                fprintf(stderr, "%s: %s\n", current->name, current->wrong);
                return 74;
            }
        }
    }
    ready();
    control_serve(listener, answer);
}
