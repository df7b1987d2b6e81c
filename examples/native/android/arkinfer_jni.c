/* What Arkinfer.kt calls: build it with your app's NDK project, linked with libarkinfer.so. */
#include <jni.h>
#include <stdlib.h>

#include "arkinfer.h"

static void raise(JNIEnv *env) {
    (*env)->ThrowNew(env, (*env)->FindClass(env, "java/lang/IllegalStateException"), ark_error());
}

JNIEXPORT jlong JNICALL Java_com_example_arkinfer_Arkinfer_open(JNIEnv *env, jclass class, jstring path) {
    (void)class;
    const char *folder = (*env)->GetStringUTFChars(env, path, NULL);
    ark_options options = {.libraries = ""}; /* lib<level>.so lies in the package: the system's loader finds it */
    ark_engine *engine = NULL;
    ark_session *session = NULL;
    ark_status status = ark_open(folder, &options, &engine);
    (*env)->ReleaseStringUTFChars(env, path, folder);
    if (!status) status = ark_session_open(engine, 0, &session);
    if (status) raise(env);
    ark_close(engine); /* the session keeps what it needs */
    return (jlong)(intptr_t)session;
}

JNIEXPORT jintArray JNICALL Java_com_example_arkinfer_Arkinfer_generate(JNIEnv *env, jclass class, jlong handle,
                                                                        jintArray prompt, jint limit, jlong seed) {
    (void)class;
    jsize length = (*env)->GetArrayLength(env, prompt);
    jint *ids = (*env)->GetIntArrayElements(env, prompt, NULL);
    int32_t *answer = calloc((size_t)limit, sizeof *answer);
    ark_generation generation = {.limit = (size_t)limit, .sampling = {.temperature = 0.7, .seed = (uint64_t)seed}};
    size_t generated = 0;
    ark_status status =
        ark_generate((ark_session *)(intptr_t)handle, ids, (size_t)length, &generation, answer, &generated);
    (*env)->ReleaseIntArrayElements(env, prompt, ids, JNI_ABORT);
    jintArray result = NULL;
    if (status && status != ARK_CANCELLED) raise(env);
    else if ((result = (*env)->NewIntArray(env, (jsize)generated)))
        (*env)->SetIntArrayRegion(env, result, 0, (jsize)generated, answer);
    free(answer);
    return result;
}

JNIEXPORT void JNICALL Java_com_example_arkinfer_Arkinfer_cancel(JNIEnv *env, jclass class, jlong handle) {
    (void)env, (void)class;
    ark_cancel((ark_session *)(intptr_t)handle);
}

JNIEXPORT void JNICALL Java_com_example_arkinfer_Arkinfer_close(JNIEnv *env, jclass class, jlong handle) {
    (void)env, (void)class;
    ark_session_close((ark_session *)(intptr_t)handle);
}
