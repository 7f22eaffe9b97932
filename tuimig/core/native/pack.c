// Compression of page frames by liblz4 or libzstd, which are loaded when they are asked for: neither is needed to build.
#include <dlfcn.h>
#include <limits.h>

#include "stream_internal.h"

enum { ZSTD_LEVEL = 1, PAYS_OUT_OF_16 = 14 };

struct library {
    const char *file, *package;
    int (*lz4_pack)(const char *from, char *to, int bytes, int room);
    int (*lz4_unpack)(const char *from, char *to, int bytes, int room);
    size_t (*zstd_pack)(void *to, size_t room, const void *from, size_t bytes, int level);
    size_t (*zstd_unpack)(void *to, size_t room, const void *from, size_t bytes);
    unsigned (*zstd_is_error)(size_t code);
    int usable;
};

static struct library libraries[3] = {
    [TM_LZ4] = {.file = "liblz4.so.1", .package = "liblz4-1"},
    [TM_ZSTD] = {.file = "libzstd.so.1", .package = "libzstd1"},
};
static pthread_once_t loaded = PTHREAD_ONCE_INIT;

static void find(void *handle, const char *name, void *function) { *(void **)function = dlsym(handle, name); }

static void load(void) {
    void *lz4 = dlopen(libraries[TM_LZ4].file, RTLD_NOW | RTLD_LOCAL);
    if (lz4) {
        struct library *it = &libraries[TM_LZ4];
        find(lz4, "LZ4_compress_default", &it->lz4_pack);
        find(lz4, "LZ4_decompress_safe", &it->lz4_unpack);
        it->usable = it->lz4_pack && it->lz4_unpack;
    }
    void *zstd = dlopen(libraries[TM_ZSTD].file, RTLD_NOW | RTLD_LOCAL);
    if (zstd) {
        struct library *it = &libraries[TM_ZSTD];
        find(zstd, "ZSTD_compress", &it->zstd_pack);
        find(zstd, "ZSTD_decompress", &it->zstd_unpack);
        find(zstd, "ZSTD_isError", &it->zstd_is_error);
        it->usable = it->zstd_pack && it->zstd_unpack && it->zstd_is_error;
    }
}

static const struct library *library(int encoding) {
    pthread_once(&loaded, load);
    return encoding > TM_RAW && encoding <= TM_ZSTD && libraries[encoding].usable ? &libraries[encoding] : NULL;
}

int tm_encoding_check(int encoding, struct tm_error *error) {
    if (encoding == TM_RAW || library(encoding)) {
        return TM_OK;
    }
    return tm_error_set(error, TM_PRIVILEGE, 0, "dlopen", "%s is not there (Debian has it in %s)",
                        encoding == TM_LZ4 ? libraries[TM_LZ4].file : libraries[TM_ZSTD].file,
                        encoding == TM_LZ4 ? libraries[TM_LZ4].package : libraries[TM_ZSTD].package);
}

size_t tm_pack(int encoding, const void *from, size_t bytes, void *to, size_t room) {
    const struct library *by = library(encoding);
    if (!by || bytes == 0 || bytes > INT_MAX) {
        return 0;
    }
    size_t pays = bytes / 16 * PAYS_OUT_OF_16;
    room = room < pays ? room : pays; // less than that saved is not worth the other side's time
    if (encoding == TM_LZ4) {
        int packed = by->lz4_pack(from, to, (int)bytes, (int)room);
        return packed > 0 ? (size_t)packed : 0;
    }
    size_t packed = by->zstd_pack(to, room, from, bytes, ZSTD_LEVEL);
    return by->zstd_is_error(packed) ? 0 : packed;
}

int tm_unpack(int encoding, const void *from, size_t packed, void *to, size_t bytes) {
    const struct library *by = library(encoding);
    if (!by || packed > INT_MAX || bytes > INT_MAX) {
        return 0;
    }
    if (encoding == TM_LZ4) {
        return by->lz4_unpack(from, to, (int)packed, (int)bytes) == (int)bytes;
    }
    return by->zstd_unpack(to, bytes, from, packed) == bytes;
}
